"""What the library and the lab both stand on: progress bars, random streams, whole files, extras, old names."""
