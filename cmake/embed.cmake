# Makes a C++ source that holds a text file: `std::string_view NAME`, declared by a header of ours.
# The build configures again when the file changes.
function(clusterkv_embed_text output file header namespace name)
  file(READ ${file} CONTENT)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  set(HEADER ${header})
  set(NAMESPACE ${namespace})
  set(NAME ${name})
  configure_file(${PROJECT_SOURCE_DIR}/cmake/embedded_text.cc.in ${output} @ONLY)
endfunction()
