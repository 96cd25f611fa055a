# libddpmx_trt, the module that runs plans: the only part that is compiled with TensorRT's headers. It is not linked to it.
#
# Its headers are looked for in TENSORRT_ROOT (a variable of CMake or of the environment), then in the system; CUDA's
# cuda_runtime_api.h, which they include, in CUDAToolkit_ROOT, beside them, and where CUDA is installed. They may be of
# TensorRT 10.3 and later, or of TensorRT-RTX: each needs a module of its own, and the option trt_module chooses one.
if(NOT DDPMX_TENSORRT MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "DDPMX_TENSORRT is ${DDPMX_TENSORRT}: ON, OFF or AUTO is needed")
endif()
if(DDPMX_TENSORRT STREQUAL "OFF")
  return()
endif()

set(TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH "An unpacked TensorRT or TensorRT-RTX, for its headers")
set(CUDAToolkit_ROOT "$ENV{CUDAToolkit_ROOT}" CACHE PATH "An installed CUDA toolkit, for its headers")
set(roots "${TENSORRT_ROOT}:${CUDAToolkit_ROOT}")
if(NOT roots STREQUAL DDPMX_TENSORRT_ROOTS) # forget what was found in others
  unset(TENSORRT_INCLUDE CACHE)
  unset(CUDA_INCLUDE CACHE)
endif()
set(DDPMX_TENSORRT_ROOTS "${roots}" CACHE INTERNAL "")

# What is missing, and what to do about it.
set(trouble "")
if(TENSORRT_ROOT)
  find_path(TENSORRT_INCLUDE NvInferRuntime.h HINTS "${TENSORRT_ROOT}"
            PATH_SUFFIXES include "include/${CMAKE_LIBRARY_ARCHITECTURE}" NO_DEFAULT_PATH)
else()
  find_path(TENSORRT_INCLUDE NvInferRuntime.h)
endif()
if(NOT TENSORRT_INCLUDE)
  set(trouble "there is no NvInferRuntime.h in the system, and TENSORRT_ROOT is not set")
  if(TENSORRT_ROOT)
    set(trouble "there is no NvInferRuntime.h in TENSORRT_ROOT, which is ${TENSORRT_ROOT}")
  endif()
  string(APPEND trouble ". Unpack TensorRT, or its headers alone (include/ of github.com/NVIDIA/TensorRT at the tag of "
                        "the TensorRT that is to run), and set TENSORRT_ROOT to it")
else()
  # "#define NV_TENSORRT_MAJOR 10", or later TRT_MAJOR_ENTERPRISE, or TRT_MAJOR_RTX
  file(STRINGS "${TENSORRT_INCLUDE}/NvInferVersion.h" lines REGEX "^#define +[A-Z_]*(MAJOR|MINOR)[A-Z_]* +[0-9]+")
  list(FILTER lines EXCLUDE REGEX "_LWS_|_SONAME_")
  set(flavour TensorRT)
  if(lines MATCHES "_RTX ")
    set(flavour TensorRT-RTX)
  endif()
  string(REGEX REPLACE ".*MAJOR[A-Z_]* +([0-9]+).*" "\\1" major "${lines}")
  string(REGEX REPLACE ".*MINOR[A-Z_]* +([0-9]+).*" "\\1" minor "${lines}")
  if(flavour STREQUAL "TensorRT" AND "${major}.${minor}" VERSION_LESS 10.3)
    set(trouble "${TENSORRT_INCLUDE} is of TensorRT ${major}.${minor}, and 10.3 or later is needed. "
                "Set TENSORRT_ROOT to one")
    string(CONCAT trouble ${trouble})
  endif()

  set(places "${TENSORRT_ROOT}" "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}" /usr/local/cuda)
  list(REMOVE_ITEM places "")
  if(CUDAToolkit_ROOT)
    set(places "${CUDAToolkit_ROOT}")
  endif()
  string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}-linux" target)
  find_path(CUDA_INCLUDE cuda_runtime_api.h HINTS ${places} "${TENSORRT_INCLUDE}"
            PATH_SUFFIXES include "targets/${target}/include")
  if(NOT CUDA_INCLUDE)
    list(JOIN places ", " places)
    set(trouble "there is no cuda_runtime_api.h, which TensorRT's headers in ${TENSORRT_INCLUDE} include, in ${places} "
                "or the system. Install CUDA's headers, and set CUDAToolkit_ROOT to the toolkit")
    string(CONCAT trouble ${trouble})
  endif()
endif()

if(trouble)
  if(DDPMX_TENSORRT STREQUAL "ON" OR TENSORRT_ROOT)
    message(FATAL_ERROR "libddpmx_trt cannot be built: ${trouble}")
  endif()
  message(STATUS "libddpmx_trt is not built, so ONNX files run here and plans do not: ${trouble}")
  return()
endif()
message(STATUS "libddpmx_trt is built for ${flavour} ${major}.${minor}: ${TENSORRT_INCLUDE}, ${CUDA_INCLUDE}")

add_library(ddpmx_trt MODULE src/trt/module.cpp)
target_include_directories(ddpmx_trt PRIVATE src)
target_include_directories(ddpmx_trt SYSTEM PRIVATE "${TENSORRT_INCLUDE}" "${CUDA_INCLUDE}")
target_link_libraries(ddpmx_trt PRIVATE ddpmx_flags ${CMAKE_DL_LIBS})
set(trt_map "${PROJECT_SOURCE_DIR}/cmake/ddpmx_trt.map")
target_link_options(ddpmx_trt PRIVATE "LINKER:--version-script=${trt_map}" LINKER:--no-undefined)
# beside libddpmx, which looks for it there
set_target_properties(ddpmx_trt PROPERTIES LINK_DEPENDS "${trt_map}" LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}")
