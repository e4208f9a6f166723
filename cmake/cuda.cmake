# SPDX-License-Identifier: Apache-2.0
# Decides whether the CUDA kernels are built and for which GPUs, and enables the language if so. Sets CUDA_ARCHITECTURES in
# CMake's form (80-real;90a-real;90-virtual; empty: not built) and CUDA_SUMMARY, the words for it.
#
#   DIEN_OPS_CUDA         auto: where there is a usable nvcc; on: an error where there is none; off: not at all
#   TORCH_CUDA_ARCH_LIST  as torch reads it, "8.0;9.0a+PTX" or "8.0 Hopper"; or "native", the GPUs of this machine.
#                         Empty: native where there is a GPU that can run the kernels, else DEFAULT_ARCHITECTURES
#
# nvcc is taken from CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, in this order.

set(OLDEST_CMAKE 3.25.2)  # knows C++20 of nvcc, and 90a
set(OLDEST_NVCC 12.0)  # C++20
set(LOWEST_CAPABILITY 8.0)  # asynchronous copies, tf32 and bfloat16 matrix products
set(DEFAULT_ARCHITECTURES 80-real 90a-real 90-virtual)  # PTX of 90, for every later GPU: that of 90a would run on no other

include(CheckLanguage)
set(CUDA_ARCHITECTURES "")

# Leaves this file: without CUDA, or not at all where CUDA was asked for.
macro(no_cuda reason)
  if(DIEN_OPS_CUDA STREQUAL "on")
    message(FATAL_ERROR "DIEN_OPS_CUDA=on, but ${reason}")
  endif()
  set(CUDA_SUMMARY "none: ${reason}")
  return()
endmacro()

# The capabilities of this machine's GPUs, those that can run the kernels; 9.0 as 9.0a.
function(native_capabilities result)
  set(capabilities "")
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE lines RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" found "${lines}")
    foreach(capability ${found})
      if(NOT capability VERSION_LESS LOWEST_CAPABILITY)
        string(REGEX REPLACE "^9\\.0$" "9.0a" capability "${capability}")
        list(APPEND capabilities ${capability})
      endif()
    endforeach()
  endif()
  set(${result} "${capabilities}" PARENT_SCOPE)
endfunction()

# torch's list in CMake's form. Capabilities that the kernels do not run on are left out: such lists are often a machine's
# setting for all packages.
function(read_capabilities given result)
  string(REGEX REPLACE "[ ,]+" ";" entries "${given}")
  string(REPLACE "Ampere" "8.0;8.6+PTX" entries "${entries}")
  string(REPLACE "Ada" "8.9+PTX" entries "${entries}")
  string(REPLACE "Hopper" "9.0+PTX" entries "${entries}")
  string(REPLACE "Blackwell" "10.0;10.3;12.0;12.1+PTX" entries "${entries}")
  set(architectures "")
  foreach(entry ${entries})
    if(NOT entry MATCHES "^([0-9]+\\.[0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must hold compute capabilities as in \"8.0;9.0a+PTX\", Ampere, Ada, Hopper or "
                          "Blackwell, or be \"native\"; got \"${entry}\"")
    endif()
    if(CMAKE_MATCH_1 VERSION_LESS LOWEST_CAPABILITY)
      message(STATUS "TORCH_CUDA_ARCH_LIST: ${entry} is left out, the kernels need ${LOWEST_CAPABILITY}")
      continue()
    endif()
    string(REPLACE "." "" number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    list(APPEND architectures ${number}-real)
    if(CMAKE_MATCH_3)
      list(APPEND architectures ${number}-virtual)
    endif()
  endforeach()
  list(REMOVE_DUPLICATES architectures)
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

if(NOT DIEN_OPS_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "DIEN_OPS_CUDA must be auto, on or off; got \"${DIEN_OPS_CUDA}\"")
endif()
if(DIEN_OPS_CUDA STREQUAL "off")
  set(CUDA_SUMMARY "none: DIEN_OPS_CUDA=off")
  return()
endif()

if(CMAKE_VERSION VERSION_LESS OLDEST_CMAKE)
  no_cuda("CMake is version ${CMAKE_VERSION}, and the CUDA kernels need ${OLDEST_CMAKE}")
endif()
unset(NVCC CACHE)  # looked for anew each time: toolkits come and go
if(NOT "$ENV{CUDACXX}" STREQUAL "")
  find_program(NVCC "$ENV{CUDACXX}")
  if(NOT NVCC)
    no_cuda("CUDACXX names $ENV{CUDACXX}, which is not there")
  endif()
endif()
find_program(NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(NOT NVCC)
  no_cuda("no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
endif()
execute_process(COMMAND "${NVCC}" --version OUTPUT_VARIABLE NVCC_VERSION ERROR_VARIABLE NVCC_VERSION)
if(NOT NVCC_VERSION MATCHES "release [0-9.]+, V([0-9.]+)")
  no_cuda("${NVCC} --version names no version")
endif()
set(NVCC_VERSION "${CMAKE_MATCH_1}")
if(NVCC_VERSION VERSION_LESS OLDEST_NVCC)
  no_cuda("${NVCC} is version ${NVCC_VERSION}, and the CUDA kernels need ${OLDEST_NVCC}")
endif()

set(native "")
if(TORCH_CUDA_ARCH_LIST STREQUAL "" OR TORCH_CUDA_ARCH_LIST STREQUAL "native")
  native_capabilities(native)
endif()
if(native)
  read_capabilities("${native}" architectures)
elseif(TORCH_CUDA_ARCH_LIST STREQUAL "native")
  no_cuda("TORCH_CUDA_ARCH_LIST=native, and nvidia-smi shows no GPU of compute capability ${LOWEST_CAPABILITY} or above")
elseif(TORCH_CUDA_ARCH_LIST STREQUAL "")
  set(architectures ${DEFAULT_ARCHITECTURES})
else()
  read_capabilities("${TORCH_CUDA_ARCH_LIST}" architectures)
  if(NOT architectures)
    no_cuda("TORCH_CUDA_ARCH_LIST=\"${TORCH_CUDA_ARCH_LIST}\" has no compute capability of ${LOWEST_CAPABILITY} or above")
  endif()
endif()

if(CMAKE_CUDA_COMPILER AND NOT CMAKE_CUDA_COMPILER STREQUAL NVCC)
  message(FATAL_ERROR "${CMAKE_BINARY_DIR} was configured with ${CMAKE_CUDA_COMPILER}, and now ${NVCC} is found: delete that folder")
endif()
set(CMAKE_CUDA_ARCHITECTURES ${architectures})
set(ENV{CUDACXX} "${NVCC}")
if(DIEN_OPS_CUDA STREQUAL "auto")  # a toolkit that is broken, or refuses this C++ compiler, is no reason to stop
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    no_cuda("${NVCC} does not compile here; DIEN_OPS_CUDA=on shows why")
  endif()
endif()
enable_language(CUDA)
execute_process(
  COMMAND "${NVCC}" -E "${CMAKE_CURRENT_LIST_DIR}/cub.cu" RESULT_VARIABLE failed OUTPUT_QUIET ERROR_VARIABLE said)
if(failed AND said MATCHES "no CUB")
  no_cuda("${NVCC} comes without the headers of CUB (CCCL), which are part of the CUDA toolkit")
endif()

set(CUDA_ARCHITECTURES ${architectures})
list(TRANSFORM architectures REPLACE "(.+)-real" "sm_\\1")
list(TRANSFORM architectures REPLACE "(.+)-virtual" "compute_\\1")
list(JOIN architectures ", " CUDA_SUMMARY)
string(APPEND CUDA_SUMMARY " by nvcc ${NVCC_VERSION}")
