"""Using a student on images: windows blended over rasters of any size, and whole tiles as published."""
