"""Whole jobs, put together from control/ and guest/: selftest, bench, up, run."""
