clusterkv_add_test(kmeans_test kmeans_test.cc)
target_link_libraries(kmeans_test PRIVATE hwy::hwy)
