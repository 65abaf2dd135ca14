"""The model `failsafe`: decoder, else fallback. The policies are in `tidewright.resilience`; here is who asks when."""
