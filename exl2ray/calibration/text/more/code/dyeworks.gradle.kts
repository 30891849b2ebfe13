import org.gradle.api.tasks.testing.logging.TestExceptionFormat

// Build of the recipe terminal of the dye works: a desktop program on twelve stainless-steel PCs without a network.
// What comes out is one zip for a USB stick, with the runtime inside and a list of checksums on paper.

plugins {
    application
    `java-library`
    kotlin("jvm") version "2.0.21"
    id("org.openjfx.javafxplugin") version "0.1.0"
    id("org.beryx.jlink") version "3.1.1"
}

group = "at.faerberei.rezept"
version = providers.gradleProperty("release").getOrElse("0-SNAPSHOT")

repositories {
    mavenCentral()
    exclusiveContent {
        forRepository { maven(url = layout.projectDirectory.dir("third_party/scales")) { name = "scales" } }
        filter { includeGroup("vendor.scales") }      // the balance driver exists as one jar from 2014 and a phone number
    }
}

java {
    toolchain { languageVersion.set(JavaLanguageVersion.of(21)) }
}

javafx {
    version = "21.0.4"
    modules("javafx.controls", "javafx.fxml")
}

val integrationTest: SourceSet by sourceSets.creating {
    compileClasspath += sourceSets.main.get().output
    runtimeClasspath += sourceSets.main.get().output
}
configurations[integrationTest.implementationConfigurationName].extendsFrom(configurations.testImplementation.get())

dependencies {
    implementation("org.xerial:sqlite-jdbc:3.46.1.3")
    implementation("com.fazecast:jSerialComm:2.11.0")
    implementation("vendor.scales:balance:1.7")
    testImplementation(kotlin("test"))
    testImplementation("org.junit.jupiter:junit-jupiter-params:5.11.3")
    constraints {
        implementation("org.slf4j:slf4j-api:2.0.16") {
            because("the balance driver asks for 1.6, which cannot be a named module")
        }
    }
}

application {
    mainModule.set("rezept.terminal")
    mainClass.set("at.faerberei.rezept.TerminalKt")
    applicationDefaultJvmArgs = listOf("-Xmx256m", "-Dprism.order=sw")
}

abstract class GenerateColourTables : DefaultTask() {
    @get:InputFile
    @get:PathSensitive(PathSensitivity.NONE)
    abstract val measurements: RegularFileProperty

    @get:OutputDirectory
    abstract val into: DirectoryProperty

    @TaskAction
    fun generate() {
        val rows = measurements.get().asFile.readLines().drop(1).map { it.split(';') }
        val bad = rows.withIndex().filter { (_, r) -> r.size != 34 }
        if (bad.isNotEmpty()) {
            throw GradleException("lines ${bad.joinToString { (it.index + 2).toString() }} do not have 31 wavelengths")
        }
        val out = into.file("reflectance.bin").get().asFile
        out.outputStream().buffered().use { s ->
            for (r in rows) for (v in r.drop(3)) {
                val n = (v.replace(',', '.').toDouble() * 100).toInt().coerceIn(0, 0xFFFF)
                s.write(n shr 8)
                s.write(n and 0xFF)
            }
        }
        logger.lifecycle("${rows.size} dyeings")
    }
}

val colourTables by tasks.registering(GenerateColourTables::class) {
    measurements.set(layout.projectDirectory.file("measurements/all.csv"))
    into.set(layout.buildDirectory.dir("generated/colour"))
}
sourceSets.main { resources.srcDir(colourTables) }

tasks.withType<Test>().configureEach {
    useJUnitPlatform()
    maxParallelForks = (Runtime.getRuntime().availableProcessors() / 2).coerceAtLeast(1)
    testLogging { exceptionFormat = TestExceptionFormat.FULL }
}

val integration by tasks.registering(Test::class) {
    description = "Talks to a balance on a pair of virtual serial ports."
    group = LifecycleBasePlugin.VERIFICATION_GROUP
    testClassesDirs = integrationTest.output.classesDirs
    classpath = integrationTest.runtimeClasspath
    shouldRunAfter(tasks.test)
    onlyIf("socat is there") { file("/usr/bin/socat").canExecute() }
}
tasks.check { dependsOn(integration) }

tasks.withType<AbstractArchiveTask>().configureEach {
    isPreserveFileTimestamps = false
    isReproducibleFileOrder = true
}

jlink {
    options.set(listOf("--strip-debug", "--no-header-files", "--no-man-pages", "--compress", "zip-6"))
    launcher { name = "rezept" }
    targetPlatform("win32") { setJdkHome(jdkDownload("file:///opt/jdks/jdk-21-windows-x64.zip")) }
}

tasks.register<Zip>("stick") {
    dependsOn(tasks.jlinkZip)
    from(layout.buildDirectory.dir("image"))
    from("docs/card_for_the_wall.pdf")
    archiveFileName.set("rezept-$version.zip")
    doLast {
        logger.lifecycle("Copy it twice. The stick in the boiler room dies every summer.")
    }
}
