"""Networks and weights formats that no library has."""
