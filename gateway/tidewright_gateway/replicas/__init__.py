"""The Tritons behind the gateway: which there are, how they are, who gets what, and what happens when one fails."""
