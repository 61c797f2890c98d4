# How a library of kernels is built: for modq itself and for every plugin with compiled code.
#
#     include("${MODQ_INCLUDE}/modq/modq.cmake")
#     modq_add_library(modq_round_cpu DESTINATION modq_round SOURCES csrc/round.cpp ISA_SOURCES csrc/isa/product.cpp)
#
# SOURCES are compiled once, for any machine; ISA_SOURCES once for each instruction set, with MODQ_ISA as its name,
# which such a file takes as its namespace. The result is a plain shared library: it links to neither Python nor torch.

option(MODQ_IN_PLACE "Put the library beside the Python files in src/, as editable installs do" OFF)
option(MODQ_STRICT "Warnings are errors" OFF)
option(MODQ_SANITIZE "Stop at invalid memory and undefined behaviour" OFF)

# Every instruction set shall give the numbers of the source: a product and a sum are fused where that says so, never
# by the compiler.
set(MODQ_NUMERICS -fno-math-errno -ffp-contract=off)

# GCC finds uninitialized values in its own header of AVX-512, and that vectors have no ABI without AVX: no function
# that takes one is called from outside its file.
set(MODQ_QUIET "")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(MODQ_QUIET -Wno-maybe-uninitialized -Wno-psabi)
endif()

# Each runs what the ones before it run; modq/isa.h chooses among the same names.
set(MODQ_ISAS portable)
set(MODQ_FLAGS_portable "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND MODQ_ISAS avx2 avx512)
  set(MODQ_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
  set(MODQ_FLAGS_avx512 ${MODQ_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni)
endif()

get_filename_component(MODQ_HEADERS "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)

function(_modq_compile target)
  target_include_directories(${target} PRIVATE "${MODQ_HEADERS}" "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  target_compile_options(${target} PRIVATE -O3 ${MODQ_NUMERICS} -Wall -Wextra ${MODQ_QUIET} ${ARGN})
  set_target_properties(${target} PROPERTIES
    CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
    POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  if(MODQ_STRICT)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(MODQ_SANITIZE)
    target_compile_options(${target} PRIVATE -g -fno-omit-frame-pointer
      -fsanitize=address,undefined -fno-sanitize-recover=undefined)
  endif()
endfunction()

function(_modq_link target)
  if(MODQ_SANITIZE)
    target_link_options(${target} PRIVATE -fsanitize=address,undefined)
  elseif(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND NOT APPLE)
    # the machine that runs a wheel may have an older C++ runtime than the one that built it
    target_link_options(${target} PRIVATE -static-libstdc++ -static-libgcc -Wl,--exclude-libs,ALL)
  endif()
endfunction()

function(modq_add_library target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "DESTINATION" "SOURCES;ISA_SOURCES")
  set(objects)
  foreach(isa IN LISTS MODQ_ISAS)
    if(arg_ISA_SOURCES)
      add_library(${target}_${isa} OBJECT ${arg_ISA_SOURCES})
      target_compile_definitions(${target}_${isa} PRIVATE MODQ_ISA=${isa})
      _modq_compile(${target}_${isa} ${MODQ_FLAGS_${isa}})
      list(APPEND objects $<TARGET_OBJECTS:${target}_${isa}>)
    endif()
  endforeach()
  # The order matters. The linker keeps the first copy of an inline function that several files hold, and the first
  # is here the one for the oldest machine. The other way round, an old machine would run std::vector in AVX-512.
  add_library(${target} SHARED ${arg_SOURCES} ${objects})
  set_target_properties(${target} PROPERTIES PREFIX lib)
  _modq_compile(${target})
  _modq_link(${target})
  if(MODQ_IN_PLACE OR SKBUILD_STATE STREQUAL "editable")
    set_target_properties(${target} PROPERTIES
      LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}/src/${arg_DESTINATION}"
      RUNTIME_OUTPUT_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}/src/${arg_DESTINATION}")
  endif()
  install(TARGETS ${target} LIBRARY DESTINATION "${arg_DESTINATION}" RUNTIME DESTINATION "${arg_DESTINATION}")
endfunction()
