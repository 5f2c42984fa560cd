clusterkv_add_test(kmeans_test kmeans_test.cc)
