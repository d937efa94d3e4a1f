"""What a `Trainer` adds to the loop: its parts (`setup`), its plans (`plan`), epochs with events, and resuming."""
