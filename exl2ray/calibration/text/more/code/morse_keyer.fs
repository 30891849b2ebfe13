\ morse.fs   A straight-key keyer and sender for the club's beacon transmitter
\ The beacon sends call sign, locator and a long dash, then is silent until the next full minute.
\ Timing follows the word PARIS: 50 units, so one unit is 1200/wpm milliseconds.

decimal

variable wpm    14 wpm !
variable tone?   0 tone? !

$40020014 constant PORTB-OUT
1 9 lshift constant KEY-BIT

: unit  ( -- ms )  1200 wpm @ / ;

: key-down  ( -- )  PORTB-OUT @ KEY-BIT or          PORTB-OUT !  -1 tone? ! ;
: key-up    ( -- )  PORTB-OUT @ KEY-BIT invert and  PORTB-OUT !   0 tone? ! ;

: units  ( n -- )  unit * ms ;

: dit  ( -- )  key-down 1 units key-up 1 units ;
: dah  ( -- )  key-down 3 units key-up 1 units ;
: gap  ( -- )  2 units ;              \ dit and dah have left one unit behind already
: word-gap  ( -- )  6 units ;

\ A letter is one cell: a leading 1, then a 0 for each dit and a 1 for each dah, first element highest.
\   A  .-   %101     B  -...  %11000

create letters
  %101 ,   %11000 , %11010 , %1100 ,  %10 ,    %10010 , %1110 ,   \ A B C D E F G
  %10000 , %100 ,   %10111 , %1101 ,  %10100 , %111 ,   %110 ,    \ H I J K L M N
  %1111 ,  %10110 , %11101 , %1010 ,  %1000 ,  %11 ,    %1001 ,   \ O P Q R S T U
  %10001 , %1011 ,  %11001 , %11011 , %11100 ,                    \ V W X Y Z

create digits
  %111111 , %101111 , %100111 , %100011 , %100001 ,
  %100000 , %110000 , %111000 , %111100 , %111110 ,

: upper  ( c -- C )  dup [char] a [char] z 1+ within if 32 - then ;

: pattern  ( c -- bits | 0 )
  upper
  dup [char] A [char] Z 1+ within if  [char] A - cells letters + @ exit  then
  dup [char] 0 [char] 9 1+ within if  [char] 0 - cells digits  + @ exit  then
  case
    [char] / of  %110010  endof
    [char] ? of  %1001100 endof
    [char] = of  %110001  endof
    0 swap
  endcase ;

\ Find the marker bit, then walk down from it.
: top-bit  ( bits -- mask )
  1 begin  2dup 2* u< 0=  while  2*  repeat  nip ;

: send-pattern  ( bits -- )
  dup top-bit 2/                     ( bits mask )
  begin  dup  while
    2dup and if dah else dit then
    2/
  repeat
  2drop gap ;

: send-char  ( c -- )
  dup bl = if  drop word-gap exit  then
  pattern ?dup if  send-pattern  then ;

: send  ( c-addr u -- )
  over + swap ?do  i c@ send-char  loop ;

\ --- the beacon -------------------------------------------------------------------------------------

2variable last-sent
variable seconds           \ counted up by the one-second interrupt

: call     s" OZ9XQB" ;
: locator  s" JO46 " ;

: carrier  ( seconds -- )  key-down 1000 * ms key-up ;

: transmit  ( -- )
  call send word-gap
  locator send
  10 carrier
  word-gap ;

: minute?  ( -- f )  seconds @ 60 mod 0= ;

: beacon  ( -- )
  key-up
  begin
    begin  minute? key? or  until
    key? if  key drop  exit  then    \ any key on the console stops it
    transmit
    begin  minute? 0=  until         \ not twice in the same second when somebody set 90 wpm
  again ;

\ --- tests, typed at the console --------------------------------------------------------------------

: .pattern  ( bits -- )
  dup top-bit 2/
  begin  dup  while
    2dup and if [char] - else [char] . then emit
    2/
  repeat 2drop space ;

: .morse  ( c-addr u -- )
  over + swap ?do
    i c@ pattern ?dup if .pattern else ." / " then
  loop ;

\ s" 73 = OZ/?" .morse
\ --... ...-- / -...- / --- --.. -..-. ..--..  ok
