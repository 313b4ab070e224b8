"""Write the checkpoint folder and its records, so that nobody ever sees half of one."""
