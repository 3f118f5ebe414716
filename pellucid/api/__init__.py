"""What callers write and read: sampling parameters, structured outputs, hidden states, request options, outputs, and their checks."""
