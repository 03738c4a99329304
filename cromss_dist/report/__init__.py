"""What runs did, on one page that needs nothing but itself: `cromss report`."""
