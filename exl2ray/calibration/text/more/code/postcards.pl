#!/usr/bin/perl
use strict;
use warnings;
use utf8;
use open qw(:std :encoding(UTF-8));

use Getopt::Long qw(:config bundling);
use List::Util qw(max sum0);
use Time::Local qw(timegm);

# postcards.pl - turns the dealer's free-text stock notes into a sorted price list
#
# A note looks like this, and there are nine thousand of them:
#
#   Llandudno pier, Valentine, p.u. 1908, sl. corner crease, RP  £6.50
#   *Bude, the canal w. lock keeper (named!) / unposted / vg / 14-

my %grade = (
    mint => 5, m => 5, ex => 4, exc => 4, vg => 3, g => 2, fair => 1, poor => 0,
);
my %fault = (
    crease => 0.8, stain => 0.75, tear => 0.5, 'album marks' => 0.9, 'stamp missing' => 0.85,
    trimmed => 0.4, foxing => 0.8,
);

my ($min_price, $sort, $check) = (0, 'place', 0);
GetOptions(
    'm|min=f'  => \$min_price,
    's|sort=s' => \$sort,
    'c|check'  => \$check,
) or die "usage: $0 [-m PRICE] [-s place|price|year] [-c] [FILE...]\n";

my (@cards, %unparsed);

while (my $line = <>) {
    chomp $line;
    next if $line =~ /^\s*(?:#|$)/;
    my %card = (line => $., file => $ARGV, faults => [], star => scalar($line =~ s/^\*\s*//));

    # price: last thing on the line. "14-" is the shorthand of her late husband for 14.00
    if ($line =~ s{[\s,/]+ £? \s* (\d+) (?: [.,](\d\d) | -)? \s* $}{}x) {
        $card{price} = $1 + ($2 // 0) / 100;
    }
    else {
        push @{ $unparsed{"no price"} }, "$ARGV:$.";
        next;
    }

    if ($line =~ s{\b p\.?u\.? \s* (?: (\d{1,2}) [./] (\d{1,2}) [./] )? (1[89]\d\d|\d\d) \b}{}xi) {
        my ($day, $month, $year) = ($1, $2, $3);
        $year += 1900 if $year < 100;
        $card{year} = $year;
        $card{posted} = eval { timegm(0, 0, 12, $day, $month - 1, $year) } if $day;
    }
    $card{rp} = 1 if $line =~ s/\bR\.?P\.?(?:PC)?\b//;
    $line =~ s/\b(?:unposted|unused|un\.)//i and $card{year} //= undef;

    for my $name (sort { length $b <=> length $a } keys %fault) {
        next unless $line =~ s/\b((?:sl(?:ight)?\.?|sm(?:all)?\.?)\s+)?(?:corner\s+)?\Q$name\Es?\b//i;
        # "slight" halves the loss
        push @{ $card{faults} }, [$name, $1 ? (1 + $fault{$name}) / 2 : $fault{$name}];
    }
    if ($line =~ s{(?:^|(?<=[\s,/])) (mint|exc?|vg|g|fair|poor|m) (?=[\s,/]|$)}{}xi) {
        $card{grade} = $grade{ lc $1 };
    }

    # What is left: place, subject, publisher, held together by stray commas and slashes
    my @rest = grep { /\w/ } map { s/^\s+|\s+$//gr } split m{[,/]}, $line;
    @card{qw(place subject)} = (shift @rest, join('; ', @rest));
    $card{place} //= '(unknown)';
    push @cards, \%card;
}
continue {
    close ARGV if eof;    # so that $. starts again with every file
}

my %by = (
    place => sub { lc $a->{place} cmp lc $b->{place} or $b->{price} <=> $a->{price} },
    price => sub { $b->{price} <=> $a->{price} },
    year  => sub { ($a->{year} // 9999) <=> ($b->{year} // 9999) },
);
my $cmp = $by{$sort} or die "cannot sort by '$sort'\n";
my @list = sort $cmp grep { $_->{price} >= $min_price } @cards;

if ($check) {
    # A flawed card that costs more than its perfect twin is usually a slip of the pen
    my %best;
    for my $c (@cards) {
        my $key = lc "$c->{place}|$c->{subject}";
        push @{ $best{$key} }, $c;
    }
    for my $key (sort keys %best) {
        my @twins = sort { ($b->{grade} // 2) <=> ($a->{grade} // 2) } @{ $best{$key} };
        for my $i (1 .. $#twins) {
            my ($good, $bad) = @twins[$i - 1, $i];
            next if $bad->{price} <= $good->{price};
            printf "%s line %d: %.2f, but line %d is better and costs %.2f\n",
                $bad->{file}, $bad->{line}, $bad->{price}, $good->{line}, $good->{price};
        }
    }
    print "$_: @{ $unparsed{$_} }\n" for sort keys %unparsed;
    exit 0;
}

my $width = max(10, map { length $_->{place} } @list);
for my $c (@list) {
    my $faults = join ', ', map { $_->[0] } @{ $c->{faults} };
    printf "%-${width}s  %-4s %s%7.2f  %s%s\n",
        $c->{place}, $c->{year} // '', $c->{star} ? '*' : ' ', $c->{price}, $c->{subject},
        $faults ? " ($faults)" : '';
}
printf "\n%d cards, %.2f in all\n", scalar @list, sum0(map { $_->{price} } @list);
