"""The engine process: scheduler, model runner, sampler and the loop that joins them."""
