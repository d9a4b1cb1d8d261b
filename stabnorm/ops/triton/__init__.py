"""The backend for GPUs in Triton: one file for each file of ops. Importing a file of it imports Triton."""
