"""The backend for CPUs in C++, built on the machine by its own compiler: one file for each file of ops."""
