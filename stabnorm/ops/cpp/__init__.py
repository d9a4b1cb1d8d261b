"""The C++ backend for CPUs, from a wheel or built on the machine by its compiler: one file for each file of ops."""
