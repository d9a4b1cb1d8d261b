"""From what a layer saw to what it means: observe -> statistics -> detect -> record. Import the module you need."""
