"""The binding of the C core: its structs and its functions, over ctypes."""
