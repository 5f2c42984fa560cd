# The sweep itself runs by hand, for hours; its test stands in for the replay.
find_package(Python3 COMPONENTS Interpreter)
if(Python3_FOUND)
  add_test(NAME sweep_test
           COMMAND Python3::Interpreter ${CMAKE_CURRENT_LIST_DIR}/sweep_test.py)
  set_tests_properties(sweep_test PROPERTIES LABELS host TIMEOUT 120)
endif()
