"""The trainers of rlrf, and the policies they train: torch and transformers live here."""
