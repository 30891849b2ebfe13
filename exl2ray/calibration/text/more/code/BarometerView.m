//
//  BarometerView.m
//  Ship's Instruments
//

#import "BarometerView.h"
#import <QuartzCore/QuartzCore.h>

NS_ASSUME_NONNULL_BEGIN

static const CGFloat kSweep = 300.0 * M_PI / 180.0;
static const double kLowest = 950.0, kHighest = 1050.0;
static void *kReadingContext = &kReadingContext;

@interface BarometerView () <UIGestureRecognizerDelegate>
@property (nonatomic, strong) CAShapeLayer *needle;
@property (nonatomic, strong) CAShapeLayer *marker;   ///< the brass hand that the skipper sets by turning the bezel
@property (nonatomic, strong) CALayer *dial;
@property (nonatomic, copy) NSArray<NSNumber *> *history;
@property (nonatomic) CGFloat grabAngle;
@end

@implementation BarometerView

- (instancetype)initWithFrame:(CGRect)frame
{
    if ((self = [super initWithFrame:frame])) {
        [self barometer_commonInit];
    }
    return self;
}

- (nullable instancetype)initWithCoder:(NSCoder *)coder
{
    if ((self = [super initWithCoder:coder])) {
        [self barometer_commonInit];
    }
    return self;
}

- (void)barometer_commonInit
{
    self.backgroundColor = UIColor.clearColor;
    self.contentMode = UIViewContentModeRedraw;
    _history = @[];

    _dial = [CALayer layer];
    _needle = [self handWithColour:UIColor.blackColor width:3];
    _marker = [self handWithColour:[UIColor colorWithRed:0.71 green:0.55 blue:0.22 alpha:1] width:2];
    for (CALayer *layer in @[_dial, _marker, _needle]) {
        [self.layer addSublayer:layer];
    }

    UIPanGestureRecognizer *turn = [[UIPanGestureRecognizer alloc] initWithTarget:self action:@selector(bezelTurned:)];
    turn.delegate = self;
    [self addGestureRecognizer:turn];

    self.isAccessibilityElement = YES;
    self.accessibilityTraits = UIAccessibilityTraitUpdatesFrequently | UIAccessibilityTraitAdjustable;
}

- (void)dealloc
{
    self.station = nil;     // goes through the setter, which takes the observer away
}

- (CAShapeLayer *)handWithColour:(UIColor *)colour width:(CGFloat)width
{
    CAShapeLayer *hand = [CAShapeLayer layer];
    hand.strokeColor = colour.CGColor;
    hand.lineWidth = width;
    hand.lineCap = kCALineCapRound;
    return hand;
}

#pragma mark - Model

- (void)setStation:(nullable WeatherStation *)station
{
    if (_station == station) return;
    [_station removeObserver:self forKeyPath:@"hectopascal" context:kReadingContext];
    _station = station;
    [_station addObserver:self
               forKeyPath:@"hectopascal"
                  options:NSKeyValueObservingOptionInitial | NSKeyValueObservingOptionNew
                  context:kReadingContext];
}

- (void)observeValueForKeyPath:(nullable NSString *)keyPath
                      ofObject:(nullable id)object
                        change:(nullable NSDictionary<NSKeyValueChangeKey, id> *)change
                       context:(nullable void *)context
{
    if (context != kReadingContext) {
        [super observeValueForKeyPath:keyPath ofObject:object change:change context:context];
        return;
    }
    NSNumber *reading = change[NSKeyValueChangeNewKey];
    if (![reading isKindOfClass:NSNumber.class]) return;   // NSNull while the sensor warms up

    // The station reports from its own queue.
    __weak typeof(self) weakSelf = self;
    dispatch_async(dispatch_get_main_queue(), ^{
        [weakSelf noteReading:reading.doubleValue];
    });
}

- (void)noteReading:(double)hPa
{
    NSMutableArray *history = [self.history mutableCopy];
    [history addObject:@(hPa)];
    if (history.count > 36) [history removeObjectAtIndex:0];    // three hours at five minutes each
    self.history = history;
    [self pointHand:self.needle at:hPa animated:self.window != nil];
    UIAccessibilityPostNotification(UIAccessibilityLayoutChangedNotification, nil);
}

/// Change over the time that is recorded, in hPa per three hours.
- (double)tendency
{
    NSUInteger n = self.history.count;
    if (n < 6) return 0;
    double change = self.history.lastObject.doubleValue - self.history.firstObject.doubleValue;
    return change * 36.0 / (n - 1);
}

- (BOOL)galeWarning
{
    return self.tendency <= -6.0;
}

#pragma mark - Geometry

- (CGFloat)angleForPressure:(double)hPa
{
    double clamped = MIN(MAX(hPa, kLowest), kHighest);
    return -kSweep / 2 + kSweep * (clamped - kLowest) / (kHighest - kLowest);
}

- (void)pointHand:(CAShapeLayer *)hand at:(double)hPa animated:(BOOL)animated
{
    CGFloat angle = [self angleForPressure:hPa];
    if (animated) {
        // Key frames through the model value, since a plain rotation takes the short way round,
        // straight across the gap at the bottom of the scale.
        CASpringAnimation *swing = [CASpringAnimation animationWithKeyPath:@"transform.rotation.z"];
        swing.fromValue = [hand.presentationLayer ?: hand valueForKeyPath:@"transform.rotation.z"];
        swing.toValue = @(angle);
        swing.damping = 9;
        swing.stiffness = 60;
        swing.duration = swing.settlingDuration;
        [hand addAnimation:swing forKey:@"swing"];
    }
    [CATransaction begin];
    CATransaction.disableActions = YES;
    [hand setValue:@(angle) forKeyPath:@"transform.rotation.z"];
    [CATransaction commit];
}

- (void)layoutSubviews
{
    [super layoutSubviews];
    CGPoint centre = CGPointMake(CGRectGetMidX(self.bounds), CGRectGetMidY(self.bounds));
    CGFloat radius = MIN(self.bounds.size.width, self.bounds.size.height) / 2 - 8;

    NSDictionary<NSNumber *, CAShapeLayer *> *lengths = @{ @0.82: self.needle, @0.70: self.marker };
    [lengths enumerateKeysAndObjectsUsingBlock:^(NSNumber *share, CAShapeLayer *hand, BOOL *stop) {
        UIBezierPath *path = [UIBezierPath bezierPath];
        [path moveToPoint:CGPointMake(0, radius * 0.15)];
        [path addLineToPoint:CGPointMake(0, -radius * share.doubleValue)];
        hand.path = path.CGPath;
        hand.position = centre;
    }];
}

- (void)drawRect:(CGRect)rect
{
    CGContextRef ctx = UIGraphicsGetCurrentContext();
    CGFloat radius = MIN(self.bounds.size.width, self.bounds.size.height) / 2 - 8;
    CGContextTranslateCTM(ctx, CGRectGetMidX(self.bounds), CGRectGetMidY(self.bounds));

    for (int hPa = (int)kLowest; hPa <= (int)kHighest; hPa++) {
        BOOL ten = hPa % 10 == 0, five = hPa % 5 == 0;
        CGContextSaveGState(ctx);
        CGContextRotateCTM(ctx, [self angleForPressure:hPa]);
        CGContextSetLineWidth(ctx, ten ? 2 : 1);
        CGContextMoveToPoint(ctx, 0, -radius);
        CGContextAddLineToPoint(ctx, 0, -radius + (ten ? 14 : five ? 10 : 6));
        CGContextStrokePath(ctx);
        if (hPa % 20 == 0 && hPa != (int)kLowest) {
            NSString *text = [NSString stringWithFormat:@"%d", hPa / 10];
            NSDictionary *font = @{ NSFontAttributeName: [UIFont fontWithName:@"Georgia" size:radius / 8] };
            CGSize size = [text sizeWithAttributes:font];
            [text drawAtPoint:CGPointMake(-size.width / 2, -radius + 18) withAttributes:font];
        }
        CGContextRestoreGState(ctx);
    }
}

#pragma mark - Turning the bezel

- (BOOL)gestureRecognizerShouldBegin:(UIGestureRecognizer *)gesture
{
    CGPoint p = [gesture locationInView:self];
    CGFloat dx = p.x - CGRectGetMidX(self.bounds), dy = p.y - CGRectGetMidY(self.bounds);
    return hypot(dx, dy) > MIN(self.bounds.size.width, self.bounds.size.height) * 0.35;
}

- (void)bezelTurned:(UIPanGestureRecognizer *)gesture
{
    CGPoint p = [gesture locationInView:self];
    CGFloat angle = atan2(p.x - CGRectGetMidX(self.bounds), CGRectGetMidY(self.bounds) - p.y);
    if (gesture.state == UIGestureRecognizerStateBegan) {
        self.grabAngle = angle;
    }
    CGFloat delta = remainder(angle - self.grabAngle, 2 * M_PI);
    self.grabAngle = angle;
    self.markedPressure = MIN(MAX(self.markedPressure + delta / kSweep * (kHighest - kLowest), kLowest), kHighest);
    [self pointHand:self.marker at:self.markedPressure animated:NO];
    if (gesture.state == UIGestureRecognizerStateEnded) {
        [self.delegate barometerView:self didMarkPressure:self.markedPressure];
    }
}

#pragma mark - Accessibility

- (nullable NSString *)accessibilityValue
{
    if (self.history.count == 0) return NSLocalizedString(@"No reading yet", nil);
    NSString *trend = fabs(self.tendency) < 0.5 ? NSLocalizedString(@"steady", nil)
                    : self.tendency > 0 ? NSLocalizedString(@"rising", nil) : NSLocalizedString(@"falling", nil);
    return [NSString stringWithFormat:NSLocalizedString(@"%.0f hectopascals, %@", nil),
            self.history.lastObject.doubleValue, trend];
}

- (void)accessibilityIncrement { self.markedPressure += 1; [self pointHand:self.marker at:self.markedPressure animated:NO]; }
- (void)accessibilityDecrement { self.markedPressure -= 1; [self pointHand:self.marker at:self.markedPressure animated:NO]; }

@end

NS_ASSUME_NONNULL_END
