"""What only a GPU can show. Without one they are skipped; GPU_TESTS_ON=cpu rehearses them."""
