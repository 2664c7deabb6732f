"""Networks and weight formats that no library provides."""
