"""A vision-language model of transformers, trained on real pictures and questions, before and after ``patch``."""
