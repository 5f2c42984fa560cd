# Warnings, sanitizers and the compiler cache, for every target.
find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  set(CMAKE_C_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

# Our own code only: generated protobuf sources link clusterkv_warnings nowhere.
add_library(clusterkv_warnings INTERFACE)
target_compile_options(clusterkv_warnings INTERFACE -Wall -Wextra -Wconversion -Werror)

if(CLUSTERKV_SANITIZER)
  add_compile_options(-fsanitize=${CLUSTERKV_SANITIZER} -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${CLUSTERKV_SANITIZER})
  if(CLUSTERKV_SANITIZER MATCHES undefined)
    add_compile_options(-fno-sanitize-recover=undefined)
  endif()
endif()
