"""image-service: the central server; operators upload images or have it fetch them, hypervisors download them."""
