# `cmake --install`: the libraries, the headers, and the files for CMake and pkg-config. All paths are relative to these
# files, so that a prefix may be moved.
option(DDPMX_INSTALL "Install libddpmx with this project" ${top_level})
if(NOT DDPMX_INSTALL)
  return()
endif()
include(CMakePackageConfigHelpers)
set(package "${CMAKE_INSTALL_LIBDIR}/cmake/ddpmx")
set(made "${PROJECT_BINARY_DIR}/generated")

install(TARGETS ddpmx EXPORT ddpmx LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
if(TARGET ddpmx_trt) # opened at run time, from the folder of libddpmx
  install(TARGETS ddpmx_trt LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
endif()
install(FILES include/ddpmx/ddpmx.h include/ddpmx/ddpmx.hpp DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/ddpmx")

# find_package(ddpmx)
install(EXPORT ddpmx NAMESPACE ddpmx:: FILE ddpmxTargets.cmake DESTINATION "${package}")
configure_package_config_file(cmake/ddpmxConfig.cmake.in "${made}/ddpmxConfig.cmake" INSTALL_DESTINATION "${package}"
                              NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file("${made}/ddpmxConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${made}/ddpmxConfig.cmake" "${made}/ddpmxConfigVersion.cmake" DESTINATION "${package}")

# pkg-config ddpmx
set(pkgconfig "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
foreach(kind LIBDIR INCLUDEDIR)
  set(pc_${kind} "\${prefix}/${CMAKE_INSTALL_${kind}}")
  if(IS_ABSOLUTE "${CMAKE_INSTALL_${kind}}")
    set(pc_${kind} "${CMAKE_INSTALL_${kind}}")
  endif()
endforeach()
file(RELATIVE_PATH up "/prefix/${pkgconfig}" "/prefix")
string(REGEX REPLACE "/$" "" up "${up}")
set(pc_PREFIX "\${pcfiledir}/${up}")
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
  set(pc_PREFIX "${CMAKE_INSTALL_PREFIX}")
endif()
configure_file(cmake/ddpmx.pc.in "${made}/ddpmx.pc" @ONLY)
install(FILES "${made}/ddpmx.pc" DESTINATION "${pkgconfig}")

set(license "${PROJECT_SOURCE_DIR}/../../LICENSE")
if(SKBUILD)
  install(FILES "${license}" DESTINATION "${SKBUILD_METADATA_DIR}/licenses")
else()
  install(FILES "${license}" DESTINATION "${CMAKE_INSTALL_DATAROOTDIR}/doc/ddpmx")
endif()
