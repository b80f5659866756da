"""From pages to a distilled student: data, teacher cache, training, evaluation, reports and the command line."""
