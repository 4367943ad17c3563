"""What certify holds vectors/manifest.json against; written by making/manifest.py."""
MANIFEST_SHA256 = "21fc3147882be43d722094f9e52ad17b2e61db1612ff37b173a536fc5bbe9aa8"
