"""Known wrong versions of our own functions, and the tests that notice each of them."""
