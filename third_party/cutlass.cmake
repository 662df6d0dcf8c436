# SPDX-License-Identifier: Apache-2.0
# Defines the interface target cutlass_headers when the CUTLASS headers are on this machine; see README.md beside this
# file. Nothing is downloaded.
set(TOKENPRUNE_CUTLASS_DIR "$ENV{TOKENPRUNE_CUTLASS_DIR}" CACHE PATH "CUTLASS checkout, or empty: the package nvidia-cutlass")

if(NOT TARGET cutlass_headers)
  set(cutlass_roots "${TOKENPRUNE_CUTLASS_DIR}")
  if(NOT TOKENPRUNE_CUTLASS_DIR)
    find_package(Python COMPONENTS Interpreter QUIET)
    if(Python_EXECUTABLE)
      # find_spec does not import the package, which would pull in its Python dependencies.
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -c
                "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] + '/source' if s else '')"
        OUTPUT_VARIABLE cutlass_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      list(APPEND cutlass_roots "${cutlass_package}")
    endif()
  endif()

  find_path(cutlass_include NAMES cutlass/cutlass.h PATHS ${cutlass_roots} PATH_SUFFIXES include NO_DEFAULT_PATH NO_CACHE)
  if(cutlass_include)
    file(STRINGS "${cutlass_include}/cutlass/version.h" cutlass_lines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
    string(REGEX REPLACE "[^0-9;]" "" cutlass_version "${cutlass_lines}")
    string(REPLACE ";" "." cutlass_version "${cutlass_version}")
    add_library(cutlass_headers INTERFACE)
    target_include_directories(cutlass_headers SYSTEM INTERFACE "${cutlass_include}")
    get_filename_component(cutlass_util "${cutlass_include}/../tools/util/include" ABSOLUTE)
    if(EXISTS "${cutlass_util}")
      target_include_directories(cutlass_headers SYSTEM INTERFACE "${cutlass_util}")
    endif()
    message(STATUS "CUTLASS ${cutlass_version}: ${cutlass_include}")
  elseif(TOKENPRUNE_CUTLASS_DIR)
    message(FATAL_ERROR "TOKENPRUNE_CUTLASS_DIR=${TOKENPRUNE_CUTLASS_DIR} holds no include/cutlass/cutlass.h")
  else()
    message(STATUS "CUTLASS headers not found")
  endif()
endif()
