# libddpmx_trt, the module that runs plans: the only part that is compiled against TensorRT, and even that is not linked to it.
#
# Its headers are looked for in TENSORRT_ROOT (a variable of CMake or of the environment), then in the system; CUDA's
# cuda_runtime_api.h, which they include, in CUDAToolkit_ROOT, beside them, and where CUDA is installed. TensorRT 10.3 and later,
# or TensorRT-RTX: a module for each is needed, and libddpmx takes the one that it is told.
if(NOT DDPMX_TENSORRT MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "DDPMX_TENSORRT is ${DDPMX_TENSORRT}: ON, OFF or AUTO is needed")
endif()
if(DDPMX_TENSORRT STREQUAL "OFF")
  return()
endif()

set(TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH "An unpacked TensorRT or TensorRT-RTX, for its headers")
set(CUDAToolkit_ROOT "$ENV{CUDAToolkit_ROOT}" CACHE PATH "An installed CUDA toolkit, for its headers")
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}-linux" cuda_target)

if(TENSORRT_ROOT)
  find_path(TENSORRT_INCLUDE NvInferRuntime.h HINTS "${TENSORRT_ROOT}"
            PATH_SUFFIXES include "include/${CMAKE_LIBRARY_ARCHITECTURE}" NO_DEFAULT_PATH)
  set(trouble "no NvInferRuntime.h in TENSORRT_ROOT, which is ${TENSORRT_ROOT}")
else()
  find_path(TENSORRT_INCLUDE NvInferRuntime.h)
  set(trouble "no NvInferRuntime.h in the system, and TENSORRT_ROOT is not set")
endif()
if(TENSORRT_INCLUDE)
  set(places "${TENSORRT_ROOT}" "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}" /usr/local/cuda)
  list(REMOVE_ITEM places "")
  if(CUDAToolkit_ROOT)
    set(places "${CUDAToolkit_ROOT}")
  endif()
  find_path(CUDA_INCLUDE cuda_runtime_api.h HINTS ${places} "${TENSORRT_INCLUDE}"
            PATH_SUFFIXES include "targets/${cuda_target}/include")
  list(JOIN places ", " places)
  set(trouble "no cuda_runtime_api.h, which ${TENSORRT_INCLUDE}/NvInferRuntime.h includes, in ${places} or the system: "
              "set CUDAToolkit_ROOT")
  string(CONCAT trouble ${trouble})
endif()

if(NOT TENSORRT_INCLUDE OR NOT CUDA_INCLUDE)
  set(advice "Unpack TensorRT, or its headers (include/ of github.com/NVIDIA/TensorRT at the tag of your TensorRT), and set TENSORRT_ROOT to it")
  if(DDPMX_TENSORRT STREQUAL "ON")
    message(FATAL_ERROR "DDPMX_TENSORRT is ON, and there is ${trouble}. ${advice}")
  endif()
  message(STATUS "libddpmx_trt is not built, so this libddpmx runs ONNX files and no plans: ${trouble}. ${advice}")
  return()
endif()

file(STRINGS "${TENSORRT_INCLUDE}/NvInferVersion.h" lines
     REGEX "^#define +(NV_TENSORRT|TRT)_(MAJOR|MINOR)(_RTX|_ENTERPRISE)? +[0-9]+")
string(REGEX MATCH "_MAJOR[A-Z_]* +([0-9]+)" ignored "${lines}")
set(major "${CMAKE_MATCH_1}")
string(REGEX MATCH "_MINOR[A-Z_]* +([0-9]+)" ignored "${lines}")
set(minor "${CMAKE_MATCH_1}")
set(flavour TensorRT)
if(lines MATCHES "_RTX")
  set(flavour TensorRT-RTX)
elseif(NOT major OR "${major}.${minor}" VERSION_LESS 10.3)
  message(FATAL_ERROR "${TENSORRT_INCLUDE} is of TensorRT ${major}.${minor}, and 10.3 or later is needed. "
                      "Set TENSORRT_ROOT to another one, or build with -DDDPMX_TENSORRT=OFF")
endif()
message(STATUS "libddpmx_trt is built for ${flavour} ${major}.${minor}: ${TENSORRT_INCLUDE}, ${CUDA_INCLUDE}")

add_library(ddpmx_trt MODULE src/trt/module.cpp)
target_include_directories(ddpmx_trt PRIVATE src)
target_include_directories(ddpmx_trt SYSTEM PRIVATE "${TENSORRT_INCLUDE}" "${CUDA_INCLUDE}")
target_link_libraries(ddpmx_trt PRIVATE ddpmx_flags ${CMAKE_DL_LIBS})
set(trt_map "${PROJECT_SOURCE_DIR}/cmake/ddpmx_trt.map")
target_link_options(ddpmx_trt PRIVATE "LINKER:--version-script=${trt_map}" LINKER:--no-undefined)
# beside libddpmx, where that looks for it
set_target_properties(ddpmx_trt PROPERTIES LINK_DEPENDS "${trt_map}" LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}")
