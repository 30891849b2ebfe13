#' First arrival dates of swifts: trend over the years with counts of watchers taken into account.
#'
#' The first bird is seen earlier when more people look, so a raw regression of first dates on the year mostly
#' measures how popular the scheme has become. Here every observer's own first date is used and the date at which
#' a fixed share of observers has seen a swift is followed over time.

read_sightings <- function(path) {
  x <- read.csv(path, colClasses = c(observer = "character", date = "Date", lat = "numeric"))
  bad <- is.na(x$date) | x$lat < 49 | x$lat > 61
  if (any(bad)) {
    warning(sum(bad), " of ", nrow(x), " records dropped (no date, or not in Britain)", call. = FALSE)
    x <- x[!bad, ]
  }
  x$year <- as.integer(format(x$date, "%Y"))
  x$doy  <- as.integer(format(x$date, "%j"))
  # Swifts before 1 April are almost always something else on a windy day.
  x <- x[x$doy >= 91 & x$doy <= 181, ]
  first <- aggregate(doy ~ observer + year + lat, data = x, FUN = min)
  first[order(first$year, first$doy), ]
}

#' Quantile of first dates per year, moved to a common latitude.
#'
#' `slope` is days per degree northwards; estimated from the data unless given.
arrival_index <- function(first, prob = 0.25, at_lat = 52, slope = NULL, min_observers = 15) {
  if (is.null(slope)) {
    fit <- lm(doy ~ factor(year) + lat, data = first)
    slope <- unname(coef(fit)["lat"])
  }
  first$std <- first$doy - slope * (first$lat - at_lat)
  by_year <- split(first$std, first$year)
  n <- lengths(by_year)
  out <- data.frame(
    year = as.integer(names(by_year)),
    n    = as.integer(n),
    day  = vapply(by_year, quantile, numeric(1), probs = prob, names = FALSE)
  )
  out <- out[out$n >= min_observers, ]
  attr(out, "slope") <- slope
  out
}

#' Theil-Sen line: median of the slopes between all pairs of years. One odd spring does not move it.
theil_sen <- function(x, y) {
  pairs <- combn(length(x), 2)
  s <- (y[pairs[2, ]] - y[pairs[1, ]]) / (x[pairs[2, ]] - x[pairs[1, ]])
  b <- median(s)
  c(intercept = median(y - b * x), slope = b)
}

trend_interval <- function(index, level = 0.9, reps = 2000) {
  n <- nrow(index)
  boot <- replicate(reps, {
    i <- sort(sample.int(n, replace = TRUE))
    if (length(unique(index$year[i])) < 3) return(NA_real_)
    # ties in the year would divide by zero, so repeated years are averaged away first
    u <- unique(index[i, c("year", "day")])
    theil_sen(u$year, u$day)["slope"]
  })
  quantile(boot, c((1 - level) / 2, (1 + level) / 2), na.rm = TRUE, names = FALSE)
}

plot_trend <- function(index) {
  line <- theil_sen(index$year, index$day)
  ci <- trend_interval(index)
  op <- par(mar = c(4, 5, 2, 1), las = 1)
  on.exit(par(op))
  plot(index$year, index$day, pch = 16, cex = sqrt(index$n / median(index$n)), axes = FALSE, xlab = "", ylab = "")
  axis(1)
  days <- pretty(index$day)
  axis(2, at = days, labels = format(as.Date(days - 1, origin = "2023-01-01"), "%d %b"))
  abline(line["intercept"], line["slope"], lwd = 2)
  title(sprintf("%.1f days per decade (%.1f to %.1f)", 10 * line["slope"], 10 * ci[1], 10 * ci[2]), adj = 0)
  invisible(list(line = line, interval = ci))
}

if (!interactive() && length(args <- commandArgs(trailingOnly = TRUE)) == 2L) {
  set.seed(4)
  index <- arrival_index(read_sightings(args[1]))
  pdf(args[2], width = 7, height = 4.5)
  plot_trend(index)
  dev.off()
}
