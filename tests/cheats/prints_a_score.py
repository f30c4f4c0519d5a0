"""Prints a fine score and exits 0 without a result."""
WALL = "clock"
EXPECT = "crash", "without a result"
if __name__ == "__main__":
    print("val_bpb: 0.812345\ntraining_seconds: 300.0")
