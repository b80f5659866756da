"""One training loop for teachers, students alone and distilled students, and the engines that run it."""
