#!/usr/bin/perl
# Statistics from the log of a mail transfer agent, for the
# monthly report of the computing service.

use strict;
use warnings;

use File::Basename qw(basename);
use Getopt::Long qw(:config no_ignore_case bundling);
use IO::Uncompress::Gunzip qw($GunzipError);
use List::Util qw(max sum0);
use POSIX qw(strftime);
use Time::Local qw(timelocal);

our $VERSION = '1.14';

my %MONTH;
@MONTH{qw(Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec)} = 0 .. 11;

my %opt = (width => 60, top => 10, year => (localtime)[5] + 1900);
GetOptions(\%opt, 'width|w=i', 'top|t=i', 'year|y=i', 'domain|d=s@', 'rejects|r', 'help|h', 'version|V')
    or usage(2);
usage(0) if $opt{help};
print(basename($0), " $VERSION\n"), exit if $opt{version};

my %local = map { lc($_) => 1 } @{ $opt{domain} || [] };

my (%queue, %hour, %sender, %reject, %relay);
my ($messages, $bytes, $bounced) = (0, 0, 0);

for my $file (@ARGV ? @ARGV : '-') {
    my $fh = open_log($file);
    while (defined(my $line = <$fh>)) {
        # Oct  3 04:17:21 mx2 postbox/smtpd[1823]: 7A1C93: client=...
        my ($mon, $day, $h, $m, $s, $prog, $text) = $line =~ m{
            ^ (\w{3}) \s+ (\d+) \s (\d\d):(\d\d):(\d\d) \s
            \S+ \s
            postbox/(\w+) \[\d+\]: \s
            (.*) $
        }x or next;
        my $stamp = timelocal($s, $m, $h, $day, $MONTH{$mon}, $opt{year});

        if ($text =~ /^NOQUEUE: reject: .*?: (\d{3}) (?:\d\.\d+\.\d+ )?(.*?);/) {
            my ($code, $why) = ($1, $2);
            $why =~ s/<[^>]*>/<...>/g;
            $why =~ s/\[[\d.:a-f]+\]/[...]/gi;
            $reject{"$code $why"}++;
            next;
        }

        next unless $text =~ s/^([0-9A-F]{6,}): //;
        my $id = $1;

        if ($prog eq 'qmgr' and $text =~ /^from=<([^>]*)>, size=(\d+)/) {
            $queue{$id} = { from => lc $1, size => $2, at => $stamp };
        }
        elsif ($text =~ /^to=<[^>]*>.*?relay=([^,\[]+).*?delay=([\d.]+).*?status=(\w+)/) {
            my ($relay, $delay, $status) = ($1, $2, $3);
            my $q = $queue{$id} or next;    # began before the log did
            if ($status eq 'sent') {
                $messages++;
                $bytes += $q->{size};
                $hour{ (localtime $stamp)[2] }++;
                $sender{ domain_of($q->{from}) }++;
                push @{ $relay{$relay} }, $delay;
            }
            elsif ($status eq 'bounced') {
                $bounced++;
            }
        }
        elsif ($text =~ /^removed\b/) {
            delete $queue{$id};
        }
    }
    close $fh;
}

printf "%d messages delivered, %s; %d bounced; %d still queued at the end\n\n",
    $messages, human($bytes), $bounced, scalar keys %queue;

print "By hour of the day\n";
my $peak = max(1, values %hour);
for my $h (0 .. 23) {
    my $n = $hour{$h} || 0;
    printf "  %02d %6d %s\n", $h, $n, '#' x int($n / $peak * $opt{width} + 0.5);
}

print "\nBusiest sending domains\n";
my @by_count = sort { $sender{$b} <=> $sender{$a} || $a cmp $b } keys %sender;
splice @by_count, $opt{top} if @by_count > $opt{top};
printf "  %6d  %s%s\n", $sender{$_}, $_, $local{$_} ? ' (ours)' : '' for @by_count;

print "\nSlowest relays (median seconds)\n";
my %median = map { $_ => median($relay{$_}) } grep { @{ $relay{$_} } >= 20 } keys %relay;
my @slow = sort { $median{$b} <=> $median{$a} } keys %median;
splice @slow, $opt{top} if @slow > $opt{top};
printf "  %8.1f  %s (%d)\n", $median{$_}, $_, scalar @{ $relay{$_} } for @slow;

if ($opt{rejects}) {
    print "\nReasons for rejection\n";
    printf "  %6d  %s\n", $reject{$_}, $_
        for sort { $reject{$b} <=> $reject{$a} } keys %reject;
}

sub open_log {
    my ($name) = @_;
    return \*STDIN if $name eq '-';
    if ($name =~ /\.gz$/) {
        return IO::Uncompress::Gunzip->new($name) || die "$name: $GunzipError\n";
    }
    open my $fh, '<', $name or die "$name: $!\n";
    return $fh;
}

sub domain_of {
    my ($address) = @_;
    return '(bounces)' if $address eq '';
    return $address =~ /\@([^\@]+)$/ ? $1 : '(no domain)';
}

sub median {
    my @v = sort { $a <=> $b } @{ $_[0] };
    return @v % 2 ? $v[$#v / 2] : ($v[@v / 2 - 1] + $v[@v / 2]) / 2;
}

sub human {
    my ($n) = @_;
    for my $unit (qw(B KiB MiB GiB)) {
        return sprintf($unit eq 'B' ? '%d %s' : '%.1f %s', $n, $unit) if $n < 1024;
        $n /= 1024;
    }
    return sprintf '%.1f TiB', $n;
}

sub usage {
    my ($status) = @_;
    my $out = $status ? \*STDERR : \*STDOUT;
    print $out <<"END";
usage: @{[ basename($0) ]} [-r] [-w columns] [-t lines] [-y year] [-d domain]... [log...]
  The log has no year in it; give -y when reading last year's.
END
    exit $status;
}
