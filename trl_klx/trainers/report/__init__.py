"""What a run tells about itself: a banner when it begins."""
