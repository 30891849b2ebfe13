#!/usr/bin/env perl
# mbox_threads.pl - print the threads of a mailing list archive as indented trees.
#
#   perl mbox_threads.pl list.mbox
#
# Threads are built from Message-ID, References and In-Reply-To. Subjects are used for nothing:
# people reply to an old mail, change the subject and start something new, or write "Re: question"
# forty times a year.

use strict;
use warnings;
use feature qw(say);

my (%message, @order);

sub decode_header {
    my ($text) = @_;
    return '' unless defined $text;
    # RFC 2047 encoded words, quoted-printable flavour only; base64 subjects are left readable
    # enough by showing them as they are.
    $text =~ s{=\?utf-8\?q\?(.*?)\?=}{
        my $word = $1;
        $word =~ tr/_/ /;
        $word =~ s/=([0-9A-F]{2})/chr hex $1/egi;
        $word;
    }egix;
    return $text;
}

sub finish {
    my ($head) = @_;
    my ($id) = ($head->{'message-id'} // '') =~ /(<[^>]+>)/ or return;
    return if exists $message{$id};    # the archive contains cross-posted copies

    my @ancestors = (($head->{references} // '') . ' ' . ($head->{'in-reply-to'} // '')) =~ /(<[^>]+>)/g;
    my ($name) = ($head->{from} // 'unknown') =~ /^"?([^"<]+?)"?\s*(?:<|$)/;
    $message{$id} = {
        id      => $id,
        from    => $name // $head->{from},
        subject => decode_header($head->{subject}),
        parents => [ reverse grep { $_ ne $id } @ancestors ],    # nearest ancestor first
        replies => [],
    };
    push @order, $id;
}

# -- read ---------------------------------------------------------------------
my ($head, $field, $in_body);
while (my $line = <>) {
    $line =~ s/\r?\n\z//;
    if ($line =~ /^From \S+\s+\w{3} \w{3} [ \d]\d/) {    # the separator, not a sentence
        finish($head) if $head;
        ($head, $field, $in_body) = ({}, undef, 0);
    }
    elsif (!$head || $in_body) {
        next;
    }
    elsif ($line eq '') {
        $in_body = 1;
    }
    elsif ($line =~ /^\s+(.*)/ && defined $field) {
        $head->{$field} .= " $1";                        # folded header line
    }
    elsif ($line =~ /^([!-9;-~]+):\s*(.*)/) {
        $field = lc $1;
        $head->{$field} //= $2;
    }
}
finish($head) if $head;

# -- link ---------------------------------------------------------------------
my @roots;
for my $id (@order) {
    my $mail = $message{$id};
    # Archives have holes. If the direct parent is missing, hang the mail below the closest
    # ancestor that is present. Only earlier mails qualify, which also rules out cycles.
    my ($parent) = grep { $message{$_} && $message{$_}{placed} } @{ $mail->{parents} };
    if ($parent) { push @{ $message{$parent}{replies} }, $mail }
    else         { push @roots, $mail }
    $mail->{placed} = 1;
}

# -- print --------------------------------------------------------------------
sub show {
    my ($mail, $prefix, $branch, $inherited) = @_;
    my $plain = $mail->{subject} =~ s/^(?:re|aw|sv):\s*//ir;
    my $shown = $plain eq $inherited ? '' : ": $plain";
    say $prefix, $branch, $mail->{from}, $shown;

    my $deeper = $prefix . ($branch eq '|- ' ? '|  ' : $branch eq '`- ' ? '   ' : '');
    my @replies = @{ $mail->{replies} };
    while (my $reply = shift @replies) {
        show($reply, $deeper, @replies ? '|- ' : '`- ', $plain);
    }
}

show($_, '', '', '') for @roots;
say scalar(@order), ' messages in ', scalar(@roots), ' threads';
