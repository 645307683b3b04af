"""Several processes: the data dealt out to them, the products summed over them."""
