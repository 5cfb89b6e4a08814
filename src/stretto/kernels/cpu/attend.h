static int attend(const Attend *a) { (void)a; return BAD_SHAPE; }
