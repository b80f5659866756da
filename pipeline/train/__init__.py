"""Training: one loop for teachers, students alone and distilled students, and the engines that run its workers."""
