"""What is compared: models, adapters, trainings, each with what is known of it."""
