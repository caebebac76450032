"""Would this training start here, and be fed? A page of findings, each with its way out."""
