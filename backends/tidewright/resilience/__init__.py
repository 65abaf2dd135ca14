"""What to do when the model can't answer, as pure decisions: breaker, retries, deadlines, degradation.

For the Triton models (threads) and for a gateway (asyncio). No I/O, no clock, no threads of its own, no torch: `now` is
a monotonic time in seconds and comes in as an argument, as does randomness. Objects with state lock themselves, for
nanoseconds; nothing waits or calls out under a lock.
"""
