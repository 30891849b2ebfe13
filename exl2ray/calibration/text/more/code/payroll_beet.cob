       IDENTIFICATION DIVISION.
       PROGRAM-ID. BEETPAY.
      *----------------------------------------------------------------
      * SETTLEMENT OF SUGAR BEET DELIVERIES, ONE CAMPAIGN.
      * READS THE WEIGHBRIDGE FILE SORTED BY GROWER, DEDUCTS SOIL TARE,
      * PAYS BY SUGAR CONTENT AND WRITES ONE LINE PER GROWER.
      * 11/86  H.K.   FIRST VERSION
      * 09/91  H.K.   EARLY DELIVERY BONUS
      * 01/99  M.B.   CENTURY IN ALL DATES
      *----------------------------------------------------------------
       ENVIRONMENT DIVISION.
       INPUT-OUTPUT SECTION.
       FILE-CONTROL.
           SELECT LOADS   ASSIGN TO "LOADS"
                  ORGANIZATION IS LINE SEQUENTIAL
                  FILE STATUS IS LOADS-STATUS.
           SELECT GROWERS ASSIGN TO "GROWERS"
                  ORGANIZATION IS INDEXED
                  ACCESS MODE IS RANDOM
                  RECORD KEY IS GR-NUMBER
                  FILE STATUS IS GROWERS-STATUS.
           SELECT LISTING ASSIGN TO "LISTING"
                  ORGANIZATION IS LINE SEQUENTIAL.

       DATA DIVISION.
       FILE SECTION.
       FD  LOADS.
       01  LOAD-RECORD.
           05  LD-GROWER           PIC 9(6).
           05  LD-DATE.
               10  LD-YEAR         PIC 9(4).
               10  LD-MONTH        PIC 99.
               10  LD-DAY          PIC 99.
           05  LD-GROSS-KG         PIC 9(6).
           05  LD-EMPTY-KG         PIC 9(6).
           05  LD-TARE-PCT         PIC 99V9.
           05  LD-SUGAR-PCT        PIC 99V99.

       FD  GROWERS.
       01  GROWER-RECORD.
           05  GR-NUMBER           PIC 9(6).
           05  GR-NAME             PIC X(28).
           05  GR-QUOTA-KG         PIC 9(9)      COMP-3.
           05  GR-FREIGHT-ZONE     PIC 9.

       FD  LISTING.
       01  LIST-LINE               PIC X(96).

       WORKING-STORAGE SECTION.
       01  LOADS-STATUS            PIC XX.
       01  GROWERS-STATUS          PIC XX.
       01  SWITCHES.
           05  LOADS-SWITCH        PIC X         VALUE "N".
               88  NO-MORE-LOADS                 VALUE "Y".
           05  GROWER-SWITCH       PIC X         VALUE "N".
               88  GROWER-KNOWN                  VALUE "Y".

       01  RATES.
           05  BASE-PRICE-TONNE    PIC 9(3)V99   VALUE 38.50.
           05  BASE-SUGAR          PIC 99V99     VALUE 16.00.
           05  PCT-PER-POINT       PIC 9V99      VALUE 9.00.
           05  EARLY-BONUS-TONNE   PIC 9V99      VALUE 2.40.
           05  SURPLUS-SHARE       PIC V99       VALUE .60.

       01  FREIGHT-TABLE.
           05  FILLER              PIC X(20)
               VALUE "00000120021003050440".
       01  FREIGHT-RATES REDEFINES FREIGHT-TABLE.
           05  FREIGHT-TONNE       PIC 99V99     OCCURS 5 TIMES.

       01  WORK-AREA.
           05  CURRENT-GROWER      PIC 9(6).
           05  NET-KG              PIC S9(7)     COMP-3.
           05  CLEAN-KG            PIC S9(7)     COMP-3.
           05  PRICE               PIC S9(3)V9(4) COMP-3.
           05  LOAD-PAY            PIC S9(7)V99  COMP-3.
           05  SUM-CLEAN           PIC S9(9)     COMP-3.
           05  SUM-PAY             PIC S9(9)V99  COMP-3.
           05  SUM-FREIGHT         PIC S9(7)V99  COMP-3.
           05  SURPLUS-KG          PIC S9(9)     COMP-3.
           05  LOAD-COUNT          PIC 9(4)      COMP.
           05  REJECT-COUNT        PIC 9(4)      COMP  VALUE ZERO.

       01  PRINT-GROWER.
           05  P-NUMBER            PIC 9(6).
           05  FILLER              PIC XX        VALUE SPACES.
           05  P-NAME              PIC X(28).
           05  P-LOADS             PIC ZZZ9.
           05  FILLER              PIC XX        VALUE SPACES.
           05  P-TONNES            PIC ZZZ,ZZ9.999.
           05  FILLER              PIC XX        VALUE SPACES.
           05  P-FREIGHT           PIC ZZ,ZZ9.99.
           05  FILLER              PIC XX        VALUE SPACES.
           05  P-PAY               PIC Z,ZZZ,ZZ9.99-.
           05  P-NOTE              PIC X(14).

       PROCEDURE DIVISION.
       MAIN-LINE.
           OPEN INPUT LOADS GROWERS OUTPUT LISTING.
           IF LOADS-STATUS NOT = "00" OR GROWERS-STATUS NOT = "00"
               DISPLAY "BEETPAY CANNOT OPEN FILES "
                       LOADS-STATUS " " GROWERS-STATUS
               MOVE 16 TO RETURN-CODE
               STOP RUN
           END-IF.
           PERFORM READ-LOAD.
           PERFORM ONE-GROWER UNTIL NO-MORE-LOADS.
           IF REJECT-COUNT > ZERO
               DISPLAY "BEETPAY LOADS REJECTED: " REJECT-COUNT
               MOVE 4 TO RETURN-CODE
           END-IF.
           CLOSE LOADS GROWERS LISTING.
           STOP RUN.

       ONE-GROWER.
           MOVE LD-GROWER TO CURRENT-GROWER GR-NUMBER.
           MOVE ZERO TO SUM-CLEAN SUM-PAY SUM-FREIGHT LOAD-COUNT.
           MOVE SPACES TO P-NOTE.
           MOVE "Y" TO GROWER-SWITCH.
           READ GROWERS
               INVALID KEY MOVE "N" TO GROWER-SWITCH
           END-READ.
           PERFORM ONE-LOAD
               UNTIL NO-MORE-LOADS OR LD-GROWER NOT = CURRENT-GROWER.
           IF GROWER-KNOWN
               PERFORM SETTLE
           END-IF.

       ONE-LOAD.
           COMPUTE NET-KG = LD-GROSS-KG - LD-EMPTY-KG.
           EVALUATE TRUE
               WHEN NOT GROWER-KNOWN
               WHEN NET-KG NOT > ZERO
               WHEN LD-SUGAR-PCT < 10.00 OR LD-SUGAR-PCT > 24.00
                   ADD 1 TO REJECT-COUNT
                   DISPLAY "REJECTED " LOAD-RECORD
               WHEN OTHER
                   PERFORM PRICE-LOAD
           END-EVALUATE.
           PERFORM READ-LOAD.

       PRICE-LOAD.
           COMPUTE CLEAN-KG ROUNDED =
               NET-KG * (100 - LD-TARE-PCT) / 100.
           COMPUTE PRICE = BASE-PRICE-TONNE *
               (1 + (LD-SUGAR-PCT - BASE-SUGAR) * PCT-PER-POINT / 100).
           IF LD-MONTH = 9 AND LD-DAY < 21
               ADD EARLY-BONUS-TONNE TO PRICE
           END-IF.
           COMPUTE LOAD-PAY ROUNDED = CLEAN-KG * PRICE / 1000.
      *    FREIGHT IS ON THE DIRTY WEIGHT: THE SOIL RIDES TOO.
           COMPUTE SUM-FREIGHT ROUNDED = SUM-FREIGHT +
               NET-KG * FREIGHT-TONNE (GR-FREIGHT-ZONE) / 1000.
           ADD CLEAN-KG TO SUM-CLEAN.
           ADD LOAD-PAY TO SUM-PAY.
           ADD 1 TO LOAD-COUNT.

       SETTLE.
           IF SUM-CLEAN > GR-QUOTA-KG
               COMPUTE SURPLUS-KG = SUM-CLEAN - GR-QUOTA-KG
               COMPUTE SUM-PAY ROUNDED = SUM-PAY -
                   SUM-PAY * SURPLUS-KG / SUM-CLEAN * (1 - SURPLUS-SHARE)
               MOVE " ABOVE QUOTA" TO P-NOTE
           END-IF.
           SUBTRACT SUM-FREIGHT FROM SUM-PAY.
           MOVE GR-NUMBER   TO P-NUMBER.
           MOVE GR-NAME     TO P-NAME.
           MOVE LOAD-COUNT  TO P-LOADS.
           DIVIDE SUM-CLEAN BY 1000 GIVING P-TONNES.
           MOVE SUM-FREIGHT TO P-FREIGHT.
           MOVE SUM-PAY     TO P-PAY.
           WRITE LIST-LINE FROM PRINT-GROWER.

       READ-LOAD.
           READ LOADS
               AT END SET NO-MORE-LOADS TO TRUE
           END-READ.
