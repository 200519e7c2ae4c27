"""What the library and the lab both need: progress bars, fixed random streams, whole files, the environment."""
