# onnxruntime_c_api.h, as the target OnnxRuntimeHeaders. Only the header: the library is opened at run time.
#
# Looked for in ORT_HOME (a variable of CMake or of the environment: an unpacked release), then in the system. Where there is
# none it is taken out of Debian's package, whose SHA-256 stands here, unless DDPMX_FETCH_DEPS is OFF.
set(ORT_HOME "$ENV{ORT_HOME}" CACHE PATH "An unpacked release of ONNX Runtime, for its headers")
if(ORT_HOME)
  find_path(ORT_INCLUDE onnxruntime_c_api.h HINTS "${ORT_HOME}"
            PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session NO_DEFAULT_PATH)
  if(NOT ORT_INCLUDE)
    message(FATAL_ERROR "ORT_HOME is ${ORT_HOME}, and there is no onnxruntime_c_api.h in it")
  endif()
endif()
find_path(ORT_INCLUDE onnxruntime_c_api.h PATH_SUFFIXES onnxruntime onnxruntime/core/session)
if(NOT ORT_INCLUDE AND DDPMX_FETCH_DEPS)
  set(url "http://deb.debian.org/debian/pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb")
  set(sha256 14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08)
  set(folder "${PROJECT_BINARY_DIR}/onnxruntime")
  if(NOT EXISTS "${folder}/usr/include/onnxruntime/onnxruntime_c_api.h")
    message(STATUS "Downloading ONNX Runtime's headers from ${url}")
    file(DOWNLOAD "${url}" "${folder}/headers.deb" EXPECTED_HASH SHA256=${sha256} STATUS status TIMEOUT 120)
    list(GET status 0 code)
    if(NOT code EQUAL 0)
      list(GET status 1 why)
      message(FATAL_ERROR "ONNX Runtime's headers cannot be downloaded (${why}). "
                          "Unpack a release of ONNX Runtime and set ORT_HOME to it")
    endif()
    find_program(ar NAMES "${CMAKE_AR}" ar REQUIRED)
    execute_process(COMMAND "${ar}" x headers.deb data.tar.xz WORKING_DIRECTORY "${folder}" COMMAND_ERROR_IS_FATAL ANY)
    file(ARCHIVE_EXTRACT INPUT "${folder}/data.tar.xz" DESTINATION "${folder}" PATTERNS "./usr/include/*")
  endif()
  set(ORT_INCLUDE "${folder}/usr/include/onnxruntime" CACHE PATH "Where onnxruntime_c_api.h is" FORCE)
endif()
if(NOT ORT_INCLUDE)
  message(FATAL_ERROR "There is no onnxruntime_c_api.h here. Unpack a release of ONNX Runtime and set ORT_HOME to it, "
                      "install libonnxruntime-dev, or allow -DDDPMX_FETCH_DEPS=ON")
endif()
message(STATUS "ONNX Runtime's headers: ${ORT_INCLUDE}")
add_library(OnnxRuntimeHeaders INTERFACE)
target_include_directories(OnnxRuntimeHeaders SYSTEM INTERFACE "${ORT_INCLUDE}")
