"""The scheduler, a pure state machine: requests, queues, passes, policies, blocks. No torch, no clock, no I/O."""
